"""A model behind an HTTP server."""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from jax.sharding import Mesh
from pydantic import ValidationError

from maxlm.adapters.lora import LoraAdapter
from maxlm.config import MaxlmError
from maxlm.config.load import load_config
from maxlm.config.sampling import SamplingConfig
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.data.tokenizer.load import load_tokenizer
from maxlm.data.tokenizer.prompts import encode_prompts
from maxlm.huggingface.families import find_family
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.model_files import is_model_path, open_model_files
from maxlm.huggingface.peft.reading import read_peft_adapter
from maxlm.huggingface.peft.settings import CONFIG as PEFT_CONFIG
from maxlm.inference.adapter_slots import LoraWeights, ServedAdapter
from maxlm.inference.cpu import find_missing_cpu_compiler
from maxlm.inference.embedding import Embedder
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.speculation import DraftModel, DraftModelConfig
from maxlm.models.architectures import Model
from maxlm.models.architectures.encoder import Encoder
from maxlm.models.architectures.encoder_decoder import EncoderDecoder
from maxlm.models.params import param_specs, select_base_params
from maxlm.run.convert import (
    find_run_family,
    find_trained_base,
    import_adapter_tokenizer,
    open_run_checkpoint,
)
from maxlm.run.load import LoadedRun, load_model
from maxlm.run.setup import use_compilation_cache
from maxlm.runtime.json_files import parse_json
from maxlm.runtime.progress import show_progress
from maxlm.sharding.mesh import parse_mesh

WarmUp = Literal["first", "behind", "never"]
_GENERATION_CONFIG = "generation_config.json"
_GENERATION_SETTINGS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
)
"""Settings of sampling that transformers and maxlm call alike."""
_LOOPBACK = ("127.", "::1", "localhost")


def serve(
    model: str,
    settings: Sequence[str] | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    api_key_file: Path | None = None,
    max_queue: int = 256,
    max_body_mb: int = 16,
    mesh: str | None = None,
    step: int | None = None,
    template: Path | None = None,
    adapter: Sequence[str] | None = None,
    warm_up: WarmUp = "behind",
    generation_config: Literal["auto", "none"] = "auto",
    allow_origin: Sequence[str] | None = None,
    log_requests: bool = False,
) -> None:
    """Loads a model and serves it until a signal; prints the URL when it is ready.
    Raises MaxlmError: an address in use, a folder that is no model, wrong settings, no
    package.

    Args:
        settings: the engine's, as ``max_sequences=16``.
        max_queue: sequences that may wait beside those that run; more get 429.
        adapter: adapters to load beside it, each NAME=FOLDER.
        warm_up: when programs are compiled, as for :func:`make_engine`.
        generation_config: "auto": settings of sampling that a request leaves out are
            those of the model's generation_config.json; "none": OpenAI's.
        allow_origin: origins whose pages may ask, such as ``https://chat.example``;
            ``*``: all.
        log_requests: print a line for each request.
    """
    try:
        from maxlm.serving.engine_loop import EngineLoop
        from maxlm.serving.server import bind_socket, read_api_key, run_server
        from maxlm.serving.server_state import ServerState
    except ModuleNotFoundError as error:
        fix = "pip install 'maxlm[serve]'"
        raise MaxlmError(
            f"the package {error.name} is not installed", fix=fix
        ) from None
    key = read_api_key(api_key_file)
    # The address is taken before a model is loaded, which may take minutes.
    with bind_socket(host, port) as bound:
        loaded = load_chat_model(model, step=step, mesh=mesh, template=template)
        read_adapter = partial(
            read_lora_adapter,
            base_folder=model,
            model=loaded.model,
            tokenizer=loaded.tokenizer,
        )
        adapters: dict[str, ServedAdapter] = {}
        for option in adapter or ():
            adapter_name, adapter_folder = _split_adapter(option)
            adapters[adapter_name] = read_adapter(adapter_folder)
        sampling_defaults: dict[str, float] = {}
        if generation_config == "auto":
            sampling_defaults = read_sampling_defaults(loaded.tokenizer)
        weights = {name: served.weights for name, served in adapters.items()}
        engine, embedder = _make_parts(loaded, settings or (), weights, warm_up)

        # What requests are checked against.
        model_max_length = loaded.config.model.max_seq_len
        max_length = model_max_length
        num_running = 0
        if engine is not None:
            max_length = engine.config.max_length
            num_running = engine.config.max_sequences * engine.num_shards
        name = name or loaded.config.name
        tokenizer = loaded.tokenizer
        as_documents = isinstance(loaded.model, Encoder | EncoderDecoder)
        del loaded  # the engine has parameters of its own

        def encode(text: str, *, allow_special: bool = False) -> list[int]:
            (tokens,) = encode_prompts(
                tokenizer,
                [text],
                as_documents=as_documents,
                allow_special=allow_special,
            )
            return tokens

        state = ServerState(
            name,
            tokenizer,
            max_length,
            encode,
            EngineLoop(engine, num_running + max_queue),
            embedder,
            api_key=key,
            max_body_bytes=max_body_mb << 20,
            read_adapter=read_adapter,
            model_max_length=model_max_length,
            sampling_defaults=sampling_defaults,
            allowed_origins=tuple(allow_origin or ()),
            prints_requests=log_requests,
        )
        for adapter_name, served in adapters.items():
            if served.tokenizer is not None:
                state.adapter_tokenizers[adapter_name] = served.tokenizer
        if key is None and host.startswith(_LOOPBACK):
            # A page of another site may have its own name lead here (DNS rebinding).
            state.allowed_hosts = {host, "localhost", "127.0.0.1", "::1"}
        elif key is None:
            message = (
                f"anyone who reaches {host} may use this server: there is no API key"
            )
            print(f"warning: {message}", file=sys.stderr)
        try:
            run_server(state, bound, lambda url: print(f"{name}: {url}", flush=True))
        finally:
            if engine is not None:
                engine.close()


def read_sampling_defaults(tokenizer: Tokenizer) -> dict[str, float]:
    """Returns the settings of sampling in the generation_config.json that a tokenizer
    came with. Raises MaxlmError: a value that cannot be."""
    text = tokenizer.extra_files.get(_GENERATION_CONFIG)
    if text is None:
        return {}
    fix = "mend the file, or serve with --generation-config none"
    values = parse_json(text, _GENERATION_CONFIG, fix)
    if not isinstance(values, dict):
        return {}
    defaults: dict[str, float] = {}
    for name in _GENERATION_SETTINGS:
        value = values.get(name)
        if value is None:
            continue
        if name == "top_k" and value == -1:  # as some write "all"
            value = 0
        try:
            settings = SamplingConfig.model_validate({name: value})
        except ValidationError as error:
            message = f"{name}={value!r}: {error.errors()[0]['msg']}"
            raise MaxlmError(message, where=_GENERATION_CONFIG, fix=fix) from None
        defaults[name] = getattr(settings, name)  # as its type has it: 50, not 50.0
    return defaults


def load_chat_model(
    folder: str, *, step: int | None, mesh: str | None, template: Path | None = None
) -> LoadedRun:
    """Loads a model on a mesh such as ``tensor=2`` (None: one device), with a chat
    template from a file in place of its own, if any."""
    loaded = load_model(folder, step=step, mesh=parse_mesh(mesh) if mesh else None)
    use_compilation_cache(loaded.config)
    if template is not None:
        text = template.read_text("utf-8", "replace")
        loaded.tokenizer.extra_files["chat_template.jinja"] = text.encode()
    return loaded


def _split_adapter(option: str) -> tuple[str, str]:
    name, _, folder = option.partition("=")
    if not name or not folder:
        message = f"--adapter {option!r} is no NAME=FOLDER"
        raise MaxlmError(message, fix="write it as --adapter tiny=runs/tiny")
    return name, folder


def read_lora_adapter(
    folder: str | Path,
    *,
    base_folder: str | Path,
    model: Model,
    tokenizer: Tokenizer | None = None,
) -> ServedAdapter:
    """Reads a LoRA adapter, from a folder of PEFT's or a run that trained one. Raises
    MaxlmError: no LoRA adapter here, PEFT's of another model, one that changes what all
    adapters share.

    Args:
        base_folder: where the model came from, which says how PEFT names its maps.
        tokenizer: the model's, in whose place a template of the adapter's own is used.
    """
    folder = Path(folder)
    if (folder / PEFT_CONFIG).exists():
        specs = select_base_params(param_specs(model))
        entries = _find_base_family(Path(base_folder)).list_entries(model.config)
        read = read_peft_adapter(folder, model.config, specs, entries)
        adapter = read.adapter
        arrays = read.arrays
        trained = {place.name for place in read.base_values}
    elif (folder / "config.yaml").exists():
        config, reader = open_run_checkpoint(folder, None)
        adapter = config.adapter
        arrays = {
            name: reader.open(name).read()
            for name in reader.shapes
            if name.endswith((".lora_a", ".lora_b"))
        }
        trained = find_trained_base(config, reader) if adapter else set()
    else:
        message = f"neither {PEFT_CONFIG} nor config.yaml here"
        fix = "name PEFT's folder, or a run's"
        raise MaxlmError(message, where=str(folder), fix=fix)
    if not isinstance(adapter, LoraAdapter):
        kind = f"adapter.kind={adapter.kind}" if adapter else "a run without an adapter"
        message = f"{kind} is not loaded beside a model"
        fix = "name one of kind lora; others are merged (maxlm convert)"
        raise MaxlmError(message, where=str(folder), fix=fix)
    if trained or adapter.token_ids:
        name = min(trained, default="rows of the table of tokens")
        message = (
            f"it was trained with {name} of the base, which all adapters here share"
        )
        fix = "serve it by itself, which merges it"
        raise MaxlmError(message, where=str(folder), fix=fix)
    adapter_tokenizer = None
    if tokenizer is not None:
        adapter_tokenizer = _read_adapter_tokenizer(folder, tokenizer, model)
    return ServedAdapter((adapter, arrays), adapter_tokenizer)


def _read_adapter_tokenizer(
    folder: Path, base: Tokenizer, model: Model
) -> Tokenizer | None:
    """The tokenizer that an adapter was trained with; None: the base's."""
    if (folder / "config.yaml").exists():
        home = folder / "tokenizer"
        tokenizer = load_tokenizer(home) if home.exists() else base
    else:
        imported = import_adapter_tokenizer(folder, base, model.config.vocab_size)
        assert imported is not None, "the base has one"
        tokenizer = imported
    if tokenizer.codec.fingerprint_input() != base.codec.fingerprint_input():
        message = "it was trained with another vocabulary than the model's"
        fix = "serve it by itself, which merges it"
        raise MaxlmError(message, where=str(folder), fix=fix)
    return None if tokenizer is base else tokenizer


def _find_base_family(base_folder: Path) -> ModelFamily:
    if is_model_path(base_folder):
        files = open_model_files(base_folder)
        return find_family(files.values, str(files.config_path))
    return find_run_family(*open_run_checkpoint(base_folder, None))[0]


def _make_parts(
    loaded: LoadedRun,
    settings: Sequence[str],
    adapters: Mapping[str, LoraWeights],
    warm_up: WarmUp,
) -> tuple[Engine | None, Embedder | None]:
    """Makes the engine and what embeds, as far as the model has them."""
    model, mesh = loaded.model, loaded.mesh
    if isinstance(model, Encoder):
        generation_options = [*settings, *adapters]
        if generation_options:
            option = generation_options[0]
            message = f"{option} is for a model that generates text; this is an encoder"
            raise MaxlmError(message, fix="leave it out")
        max_length = loaded.config.model.max_seq_len
        return None, Embedder(model, loaded.params, mesh, max_length)
    engine = make_engine(loaded, settings, adapters=adapters, warm_up=warm_up)
    if isinstance(model, EncoderDecoder):
        return engine, None
    return engine, Embedder(model, engine.params, mesh, engine.config.max_length)


def choose_max_length(config: EngineConfig, model: Model) -> EngineConfig:
    """Returns an engine's settings where ``max_length`` is the model's own, if it is
    not set.

    It bounds a sequence; the cache's memory is that of its pages, and stays what the
    default of ``max_length`` takes. Where the model's context is longer than all pages
    together, the sequence has those, and a line says so.
    """
    # What encoders' outputs take is kept by row, and grows with the longest sequence.
    if "max_length" in config.model_fields_set or isinstance(model, EncoderDecoder):
        return config
    num_pages = config.num_pages or config.max_sequences * config.pages_per_sequence + 1
    num_tokens = (num_pages - 1) * config.page_size
    model_length = model.config.max_seq_len
    max_length = min(model_length, num_tokens)
    if max_length <= config.max_length:
        return config
    if max_length < model_length:
        print(
            f"max_length is {max_length}, as many tokens as the cache's pages hold; "
            f"the model was made for {model_length}: set max_length and num_pages for "
            "more",
            file=sys.stderr,
        )
    return config.model_copy(update={"max_length": max_length, "num_pages": num_pages})


def warn_of_missing_kernels(mesh: Mesh) -> None:
    """Says in one line that a CPU goes without its kernels, because nothing can compile
    them."""
    compiler = find_missing_cpu_compiler(mesh)
    if compiler is not None:
        print(
            "warning: the kernels for CPUs are missing, and decoding takes up to twice "
            f"the time: there is no C++ compiler {compiler!r}; install g++, or name "
            "one in CXX",
            file=sys.stderr,
        )


def make_engine(
    loaded: LoadedRun,
    settings: Sequence[str] = (),
    *,
    adapters: Mapping[str, LoraWeights] | None = None,
    warm_up: WarmUp = "first",
) -> Engine:
    """Makes the engine that continues prompts with a model.

    Args:
        settings: those of ``EngineConfig``, of which ``max_length`` is by default the
            model's own (:func:`choose_max_length`).
        adapters: loaded beside the model, in an engine with slots for these at least.
        warm_up: compile all programs that it may run "first", before this returns;
            "behind", in a thread beside it while it runs, which ``Engine.close`` ends;
            "never", each when it is run.
    """
    warn_of_missing_kernels(loaded.mesh)
    config = load_config(EngineConfig, None, settings).value
    config = choose_max_length(config, loaded.model)
    max_adapters = max(config.max_adapters, len(adapters or ()))
    config = config.model_copy(update={"max_adapters": max_adapters})
    draft = None
    if isinstance(config.speculation, DraftModelConfig):
        mesh = None if loaded.mesh.size == 1 else loaded.config.mesh
        other = load_model(config.speculation.folder, mesh=mesh)
        draft_codec = other.tokenizer.codec.fingerprint_input()
        if draft_codec != loaded.tokenizer.codec.fingerprint_input():
            message = (
                f"{config.speculation.folder} has another tokenizer than "
                f"{loaded.config.name}"
            )
            fix = "use a model with the same one"
            raise MaxlmError(message, where="speculation.folder", fix=fix)
        draft = DraftModel(other.model, other.params)
    engine = Engine(loaded.model, loaded.params, config, loaded.tokenizer, draft=draft)
    for name, weights in (adapters or {}).items():
        engine.load_adapter(name, weights)
    if warm_up == "behind":
        engine.warm_up_in_background()
    if warm_up == "first":
        with show_progress("programs") as progress:
            engine.warm_up(progress)
    return engine
