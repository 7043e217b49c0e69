"""Model types that transformers knows and maxlm does not: what each lacks here, and the
family that is nearest to it.

A family that is added leaves this table: ``tests/models/test_unsupported.py``.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class UnsupportedType(NamedTuple):
    """A model type that cannot be converted."""

    needs: str
    """What it needs and maxlm, or this family's file, does not have."""
    nearest: str
    """The family that is nearest to it."""


def _group(needs: str, nearest: str, model_types: str) -> dict[str, UnsupportedType]:
    """Returns entries of model types that need the same."""
    entry = UnsupportedType(needs, nearest)
    return dict.fromkeys(model_types.split(), entry)


FILE_ALONE = "nothing but a file with its settings and the names of its weights"
"""What a type needs whose blocks are all here."""

KNOWN_UNSUPPORTED: Mapping[str, UnsupportedType] = {
    # Decoders whose blocks are all here.
    **_group(FILE_ALONE, "llama", "cwm exaone internlm3 iquestcoder"),
    **_group(FILE_ALONE, "gpt2", "gpt-sw3"),
    **_group(FILE_ALONE, "nemotron", "jais2 persimmon"),
    **_group(FILE_ALONE, "granite", "hyperclovax"),
    **_group(FILE_ALONE, "glm4_moe", "sarvam_moe solar_open"),
    **_group(FILE_ALONE, "deepseek_v3", "axk1 sarvam_mla youtu"),
    **_group(
        "a file that maps its mixture of experts",
        "qwen3_moe",
        "beam flint kolibri1 mellum",
    ),
    # Decoders of attention that need more than a file.
    "phimoe": UnsupportedType("routing by sparse mixing", "mixtral"),
    "arctic": UnsupportedType("experts beside a dense MLP", "mixtral"),
    "biogpt": UnsupportedType("a file of its own: GPT with scaled embeddings", "gpt2"),
    "bitnet": UnsupportedType("ternary weights, and norms before projections", "llama"),
    "codegen": UnsupportedType("projections fused in blocks of four", "phi"),
    "cohere2_moe": UnsupportedType("experts beside attention in parallel", "cohere2"),
    "cpmant": UnsupportedType("segments and relative biases of prompts", "t5"),
    "ctrl": UnsupportedType("sinusoids of another order, norms of GPT", "gpt2"),
    "diffllama": UnsupportedType("differential attention", "llama"),
    "doge": UnsupportedType("dynamic masks, and experts by product keys", "llama"),
    "dory": UnsupportedType("normalised weights, and layers run in a loop", "llama"),
    "gpt_neo": UnsupportedType(
        "a file of its own: windows and unscaled scores", "gpt2"
    ),
    "gpt_neox_japanese": UnsupportedType("a bias in its last layer alone", "gpt_neox"),
    "granite_swa": UnsupportedType("a theta for each layer", "granite"),
    "granitemoe_swa": UnsupportedType("a theta for each layer", "granitemoe"),
    "hrm_text": UnsupportedType("stacks of layers run in cycles", "llama"),
    "jetmoe": UnsupportedType("experts of attention's heads", "mixtral"),
    "laguna": UnsupportedType("another number of heads in each layer", "qwen3_moe"),
    "longcat_flash": UnsupportedType(
        "two attentions a layer, empty experts", "deepseek_v3"
    ),
    "minicpm3": UnsupportedType(
        "latent attention with factors on what branches add", "deepseek_v3"
    ),
    "modernbert-decoder": UnsupportedType("a first layer without a norm", "gemma3"),
    "openai-gpt": UnsupportedType("a file of its own: GPT-2 with norms behind", "gpt2"),
    "xglm": UnsupportedType("sinusoids of another order", "bart"),
    # Sparse attention, hyper-connections, several streams.
    "axk2": UnsupportedType("gated norms", "deepseek_v32"),
    **_group(
        "compressed attention, hyper-connections and hash routing",
        "deepseek_v3",
        "deepseek_v4 hy_v4",
    ),
    **_group(
        "sparse attention of blocks, and an encoder of images",
        "qwen3_moe",
        "minimax_m3_vl_text dots3_note dots3_note_text mistral_large4",
    ),
    **_group(
        "encoders of images and sound beside the text",
        "gemma3n",
        "gemma3n",
    ),
    **_group(
        "encoders of images and sound beside the text",
        "gemma4",
        "gemma4 gemma4_unified",
    ),
    **_group("a file with the names of its weights", "gemma4", "gemma4_unified_text"),
    **_group(
        "keys and values of another model",
        "gemma4",
        "gemma4_assistant gemma4_unified_assistant",
    ),
    **_group(
        "relative logits, short convolutions and streams of several layers",
        "qwen3_moe",
        "inkling_text inkling2_text inkling2_loop_text",
    ),
    "blt": UnsupportedType("patches of bytes, and three models in one", "llama"),
    "zaya": UnsupportedType("compressed convolutional attention", "qwen3_moe"),
    # Recurrences and hybrids.
    **_group("Gated DeltaNet beside windows", "qwen3_next", "lara_mini"),
    **_group(
        "sparse attention, hyper-connections and n-gram embeddings",
        "qwen3_5_moe",
        "qwen4_exp qwen4_exp_text",
    ),
    **_group("experts in a file of its own", "lfm2_moe", "lfm3"),
    "recurrent_gemma": UnsupportedType("the recurrence RG-LRU", "gemma"),
    "rwkv": UnsupportedType("RWKV's recurrence", "llama"),
    "xlstm": UnsupportedType("xLSTM's recurrences", "llama"),
    # Decoders with an encoder of something else than text.
    **_group(
        "an encoder of images beside the text",
        "llama",
        """aria aria_text aya_vision cohere2_vision cohere_compass cohere_compass_text
        deepseek_vl deepseek_vl_hybrid ernie4_5_vl_moe exaone4_5 fuyu glm46v
        glm4v glm4v_moe got_ocr2 hunyuan_vl idefics2 idefics3 internvl janus kimi_k25
        lfm2_vl llava llava_next llava_onevision mistral3 mistral4 mllama ovis2
        perception_lm phi4_multimodal qwen2_5_vl qwen2_vl qwen3_vl
        qwen3_vl_moe shieldgemma2 smolvlm t5gemma2 vipllava""",
    ),
    **_group("an encoder of images beside the text", "gemma3", "gemma3 paligemma"),
    **_group("an encoder of images beside the text", "llama4", "llama4"),
    **_group("an encoder of images beside the text", "qwen3_5", "qwen3_5"),
    **_group("an encoder of images beside the text", "qwen3_5_moe", "qwen3_5_moe"),
    **_group(
        "codes of images among the tokens",
        "llama",
        "chameleon emu3 apertus1p5 apertus1p5_text",
    ),
    **_group(
        "an encoder of sound beside the text",
        "qwen2",
        """granite_speech moshi moss_transcribe_diarize musicgen musicgen_melody
        qwen2_5_omni qwen2_audio qwen3_omni_moe voxtral whisper""",
    ),
    # Encoders, and encoders beside decoders.
    **_group(
        "a file with the names of its weights, as BERT's",
        "bert",
        """albert bert-generation camembert data2vec-text distilbert electra ernie
        megatron-bert roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl""",
    ),
    **_group(
        "another attention than BERT's",
        "bert",
        """big_bird deberta deberta-v2 longformer modernbert nomic_bert reformer
        rembert roc_bert roformer xlm xlnet xmod""",
    ),
    **_group(
        "a file with the names of its weights, as BART's",
        "bart",
        """blenderbot blenderbot-small m2m_100 marian mbart mvp pegasus plbart""",
    ),
    **_group(
        "another attention than BART's",
        "bart",
        "bigbird_pegasus led pegasus_x prophetnet git trocr",
    ),
    **_group("a file with the names of its weights, as T5's", "t5", "mt5 umt5"),
    "longt5": UnsupportedType("local attention in an encoder", "t5"),
    **_group("experts in an encoder-decoder", "t5", "nllb-moe switch_transformers"),
    **_group("Gemma's layers in an encoder-decoder", "gemma2", "t5gemma"),
    "chatglm": UnsupportedType("the form that transformers loads as GLM", "glm"),
}
"""By ``model_type``."""

_CLASS_ENDINGS = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel", "Model")


def get_class_stem(architecture: str) -> str:
    """Returns the name of a class of transformers without what says its task:
    "LlamaForCausalLM" → "Llama"."""
    stem = architecture
    for ending in _CLASS_ENDINGS:
        stem = stem.removesuffix(ending)
    return stem


def find_unsupported(model_type: object, architectures: Sequence[str]) -> str | None:
    """Finds a config.json's model type in :data:`KNOWN_UNSUPPORTED`, by ``model_type``
    or by its class; None: it is not there."""
    if isinstance(model_type, str) and model_type in KNOWN_UNSUPPORTED:
        return model_type
    by_name = {_normalise(name): name for name in KNOWN_UNSUPPORTED}
    for architecture in architectures:
        name = by_name.get(_normalise(get_class_stem(architecture)))
        if name is not None:
            return name
    return None


def _normalise(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
