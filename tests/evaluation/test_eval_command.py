"""``maxlm eval`` from a checkpoint's folder to the result files, without torch."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from maxlm.data.tokenizer.load import export_tokenizer
from tests.serving.running import train_chat_tokenizer
from tests.train.tiny import environment

pytestmark = pytest.mark.heavy

PROGRAM = """
import sys
from maxlm.cli.main import main
code = main({arguments})
assert "torch" not in sys.modules
sys.exit(code)
"""


def write_checkpoint(folder) -> None:
    """A Llama of random values, as a Hugging Face folder."""
    tokenizer = train_chat_tokenizer()
    export_tokenizer(tokenizer, folder)
    D = 32
    F = 48
    V = tokenizer.vocab_size
    layers = 2
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": V,
    }
    config |= {"hidden_size": D, "intermediate_size": F, "num_hidden_layers": layers}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config |= {"max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 1e4}
    config |= {"tie_word_embeddings": True, "hidden_act": "silu"}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens": (V, D), "model.norm": (D,)}
    for n in range(layers):
        shapes |= {
            f"model.layers.{n}.{name}": shape
            for name, shape in {
                "input_layernorm": (D,),
                "post_attention_layernorm": (D,),
                "self_attn.q_proj": (32, D),
                "self_attn.k_proj": (16, D),
                "self_attn.v_proj": (16, D),
                "self_attn.o_proj": (D, 32),
                "mlp.gate_proj": (F, D),
                "mlp.up_proj": (F, D),
                "mlp.down_proj": (D, F),
            }.items()
        }
    random = np.random.default_rng(0)
    values = {
        f"{k}.weight": random.normal(0, 0.2, s).astype("f4") for k, s in shapes.items()
    }
    save_file(values, folder / "model.safetensors")


def test_the_harness_makes_a_model_of_its_arguments(tmp_path):
    from lm_eval.api.registry import get_model

    import maxlm.evaluation.lm_eval_command  # noqa: F401  (registers it)

    write_checkpoint(tmp_path)
    arguments = f"run={tmp_path},max_length=90,max_sequences=2,mesh=fsdp=2;tensor=2,max_gen_toks=5"
    model_arguments = {"batch_size": 1, "device": None}
    model = get_model("maxlm").create_from_arg_string(arguments, model_arguments)
    assert (model.max_length, model.engine.config.max_sequences) == (90, 2)
    assert model.engine.mesh.shape["tensor"] == 2
    (text,) = model.generate_until([SimpleNamespace(args=("what", {"until": []}))])
    assert isinstance(text, str)


@pytest.mark.more
def test_a_checkpoint_to_result_files_without_torch(tmp_path):
    folder, data = tmp_path / "model", tmp_path / "data"
    folder.mkdir()
    data.mkdir()
    write_checkpoint(folder)
    rows = [
        {"query": f"Question: q{n}\n", "choices": ["is", "what"], "gold": 0}
        for n in range(5)
    ]
    for name in ("piqa", "piqa_train"):
        (data / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    questions = [{"question": f"q{n}", "answer": f"so\n#### {n}"} for n in range(3)]
    for split in ("train", "test"):
        path = data / f"gsm8k_{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in questions))
    arguments = [
        "eval",
        str(folder),
        "--tasks",
        "piqa,gsm8k",
        "--data",
        str(data),
        "--chat",
    ]
    arguments += ["--shots", "1", "--limit", "3", "--output", str(tmp_path / "out")]
    arguments += [
        "max_length=300",
        "max_sequences=3",
        "max_chunks=1",
        "prefill_tokens=48",
    ]
    command = [sys.executable, "-c", PROGRAM.format(arguments=arguments)]
    done = subprocess.run(
        command, env=environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "exact_match (strict-match)" in done.stdout
    (path,) = (tmp_path / "out").glob("results_*.json")
    results = json.loads(path.read_text())
    assert results["model_name"] == "model"
    assert results["n-samples"]["piqa"] == {"original": 5, "effective": 3}
    assert results["n-shot"] == {"piqa": 1, "gsm8k": 1}
    assert results["maxlm"]["seconds_by_task"].keys() == {"piqa", "gsm8k"}
    assert results["maxlm"]["generated_tokens"] > 0
    (path,) = (tmp_path / "out").glob("samples_piqa_*.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    assert [sample["doc_id"] for sample in samples] == [0, 1, 2]
    accuracy = np.mean([sample["acc"] for sample in samples])
    assert results["results"]["piqa"]["acc,none"] == accuracy
    prompt = samples[0]["arguments"]["gen_args_0"]["arg_0"]
    assert prompt.startswith("<|im_start|>user\nQuestion: q")
    assert (
        prompt.count("<|im_start|>assistant\n") == 2
    )  # the example's, and the one to answer
