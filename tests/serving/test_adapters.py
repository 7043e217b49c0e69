"""Promise: a server loads adapters while it runs, PEFT's folders and runs, and answers
with the one that a request names."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from maxlm.adapters.ia3 import Ia3Adapter
from maxlm.config.sampling import SamplingConfig
from maxlm.config.show import to_yaml
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.load import export_tokenizer
from maxlm.data.tokenizer.train import train_tokenizer
from maxlm.huggingface.checkpoint import RunCheckpointWriter
from maxlm.huggingface.families import FAMILIES
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.requests import GenerationRequest
from maxlm.run.config import RunConfig
from maxlm.run.convert import convert
from maxlm.run.load import LoadedRun
from maxlm.serving.program import make_engine, read_lora_adapter
from tests.errors import message
from tests.inference.conftest import CONFIGS, build
from tests.inference.test_adapters import ADAPTERS, draw_arrays, merge
from tests.serving.running import run_in_thread, train_chat_tokenizer
from tests.train import tiny as tiny_run

SIZES = ["max_sequences=4", "max_length=128", "page_size=8", "max_adapters=2"]
URLS = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def tokenizer():
    return train_chat_tokenizer()


@pytest.fixture(scope="module")
def tiny(one_device_mesh, tokenizer):
    size = {"vocab_size": tokenizer.vocab_size, "max_seq_len": 256}
    return build(CONFIGS["llama"] | size, one_device_mesh)


def write_run(folder: Path, tiny: Any, adapter: Any) -> Path:
    """A run that holds an adapter's arrays."""
    settings = tiny_run.settings(folder, "") | {"adapter": adapter.model_dump()}
    settings["model"] = tiny.model.config.model_dump()
    config = RunConfig.model_validate(settings)
    writer = RunCheckpointWriter(folder / "checkpoints")
    for name, array in draw_arrays(tiny, ADAPTERS["out"]).items():
        writer.declare(name, array.shape)
        writer.write(name, (), array)
    writer.commit({"config": config.model_dump(mode="json")})
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny) -> dict[str, Path]:
    """A base, and its adapter as a run and as PEFT has it."""
    home = tmp_path_factory.mktemp("adapters")
    (home / "base").mkdir()
    values = FAMILIES.get("llama").write_config(tiny.model.config)
    (home / "base" / "config.json").write_text(json.dumps(values))
    run = write_run(home / "run", tiny, ADAPTERS["out"])
    convert(run, home / "peft", adapter=True)
    ia3 = write_run(home / "ia3", tiny, Ia3Adapter())
    return {"base": home / "base", "run": run, "peft": home / "peft", "ia3": ia3}


@pytest.fixture(scope="module")
def server(one_device_mesh, tiny, tokenizer, folders):
    read = partial(read_lora_adapter, base_folder=folders["base"], model=tiny.model)
    read = partial(read, tokenizer=tokenizer)
    loaded = LoadedRun(Any, one_device_mesh, tiny.model, tiny.params, tokenizer, 0)  # type: ignore
    adapters = {"run": read(folders["run"]).weights}
    engine = make_engine(loaded, SIZES, adapters=adapters, warm_up="never")
    start = partial(
        run_in_thread, make_engine=lambda _: engine, api_key="key", read_adapter=read
    )
    with start(tokenizer, max_length=128) as running:
        running.http.headers["authorization"] = "Bearer key"
        yield running


def ask(server: Any, model: str) -> Any:
    body = {"model": model, "prompt": "the model", "max_tokens": 12, "temperature": 0}
    return server.http.post("/v1/completions", json=body)


def answer_alone(tiny: Any, tokenizer: Any, name: str | None) -> str:
    merged = merge(tiny, name)
    engine = Engine(
        merged.model, merged.params, EngineConfig(max_length=128), tokenizer
    )
    prompt = (tokenizer.bos_id, *tokenizer.encode("the model"))
    sampling = SamplingConfig(temperature=0, max_new_tokens=12)
    return "".join(
        o.text for o in engine.run([GenerationRequest("x", prompt, sampling)])
    )


@pytest.mark.more
@pytest.mark.heavy
def test_adapters_are_loaded_listed_named_and_unloaded(
    server, tiny, tokenizer, folders
):
    def names() -> list[str]:
        return [model["id"] for model in server.http.get("/v1/models").json()["data"]]

    assert names() == ["fake", "fake:run"]
    assert ask(server, "fake:peft").status_code == 404
    body = {"lora_name": "peft", "lora_path": str(folders["peft"])}
    loaded = server.http.post(URLS[0], json=body).json()
    assert (loaded["id"], loaded["parent"]) == ("fake:peft", "fake")
    assert names() == ["fake", "fake:run", "fake:peft"]
    assert server.http.get("/v1/models/fake:peft").json()["id"] == "fake:peft"
    plain, adapted = (answer_alone(tiny, tokenizer, name) for name in (None, "out"))
    assert plain != adapted
    for model, text in (("fake", plain), ("fake:run", adapted), ("fake:peft", adapted)):
        answer = ask(server, model).json()
        assert (answer["model"], answer["choices"][0]["text"]) == (model, text)
    scores = [
        server.http.post(
            "/v1/score", json={"model": m, "text_1": "a", "text_2": "b"}
        ).json()
        for m in ("fake", "fake:run", "fake:peft")
    ]
    plain, *adapted = (score["data"][0]["score"] for score in scores)
    assert adapted[0] == pytest.approx(adapted[1], abs=1e-5) != plain
    gone = server.http.post(URLS[1], json={"lora_name": "peft"})
    assert gone.json() == {"id": "fake:peft", "object": "model", "deleted": True}
    error = ask(server, "fake:peft").json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert names() == ["fake", "fake:run"]


def test_what_cannot_be_loaded_is_refused(server, tiny, folders, tmp_path):
    def load(path: Path, name: str = "other") -> tuple[int, str]:
        answer = server.http.post(
            URLS[0], json={"lora_name": name, "lora_path": str(path)}
        )
        return answer.status_code, answer.json()["error"]["message"]

    status, text = load(tmp_path)
    assert status == 400
    assert "adapter_config.json" in text
    status, text = load(folders["run"], "run")
    assert status == 400
    assert "loaded already" in text
    assert "adapter.kind=ia3" in load(folders["ia3"])[1]
    other = build(
        CONFIGS["llama"] | {"d_model": 24},
        tiny.params["embedding"]["table"].sharding.mesh,
    )
    assert (
        "kernel.lora_b [2, 8, 24]"
        in load(write_run(tmp_path / "run", other, ADAPTERS["out"]))[1]
    )
    assert (
        server.http.post(
            URLS[0], json={"lora_name": "a b", "lora_path": "x"}
        ).status_code
        == 400
    )
    assert server.http.post(URLS[1], json={"lora_name": "nobody"}).status_code == 404
    for url in URLS:
        answer = server.http.post(
            url, json={"lora_name": "run"}, headers={"authorization": ""}
        )
        assert answer.status_code == 401
    peft = partial(read_lora_adapter, folders["peft"], base_folder=folders["base"])
    fault = message(peft, model=other.model)
    assert "is [20, 8], and [24, 8] by the settings and this model" in fault


def test_conversations_are_written_by_the_adapters_own_template(
    server, tokenizer, folders, tmp_path
):
    """PEFT's folders hold the tokenizer that the adapter was trained with, or its
    template."""
    shutil.copytree(folders["peft"], tmp_path / "peft")
    (tmp_path / "peft" / "chat_template.jinja").write_text(
        "my own: {{ messages[0].content }}"
    )
    body = {"lora_name": "own", "lora_path": str(tmp_path / "peft")}
    assert server.http.post(URLS[0], json=body).status_code == 200
    messages = [{"role": "user", "content": "the model"}]
    texts = {}
    for name in ("fake", "fake:run", "fake:own"):
        answer = server.http.post(
            "/tokenize", json={"model": name, "messages": messages}
        ).json()
        texts[name] = tokenizer.decode(answer["tokens"])
    assert texts["fake:own"] == "my own: the model"
    assert texts["fake"] == texts["fake:run"] != texts["fake:own"]
    server.http.post(URLS[1], json={"lora_name": "own"})

    other = train_tokenizer(
        TokenizerConfig(vocab_size=280, chat="chatml"),
        ["quite another text of words\n"] * 20,
    )
    export_tokenizer(other, tmp_path / "peft")
    answer = server.http.post(URLS[0], json=body).json()
    assert (
        "trained with another vocabulary than the model's" in answer["error"]["message"]
    )
