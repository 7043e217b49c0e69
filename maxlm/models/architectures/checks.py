"""Checks that the settings of a transformer go together."""

from maxlm.config import MaxlmError
from maxlm.models.architectures.pattern import LayerKind, suggest_kind
from maxlm.models.architectures.settings import TransformerSettings
from maxlm.models.blocks import BlockConfig, ReadsSharedBlock, normalizes_itself
from maxlm.models.layers.attention import AttentionConfig
from maxlm.models.layers.positions import PositionsConfig
from maxlm.models.layers.rope import DynamicNtkScaling, NtkScaling


def check_settings(config: TransformerSettings) -> None:
    """Raises MaxlmError: two settings exclude each other, or one needs another."""
    check_parts(config)
    check_frontend(config)
    check_kinds(config)
    check_modules(config)
    check_shared_keys(config)
    check_streams(config)
    check_norms_of_mixers(config)
    check_shared_blocks(config)
    check_positions(config)


def check_parts(config: TransformerSettings) -> None:
    """Raises MaxlmError: two settings give the mixer or the feed-forward of a layer, or
    a pattern and attention its window."""
    if config.attention is not None and config.mixer is not None:
        raise MaxlmError("both attention and mixer", fix="give one of them")
    if config.ffn and (config.mlp or config.moe):
        raise MaxlmError("ffn beside mlp or moe", fix="leave the others out")
    num_dense = config.dense_layers
    has_both = config.mlp is not None and config.moe is not None
    names_dense_kind = any(kind.ffn == "mlp" for kind in config.list_all_kinds())
    if has_both and not num_dense and not names_dense_kind:
        raise MaxlmError(
            "both mlp and moe",
            fix="set one of them to null, or dense_layers above 0",
        )
    if num_dense and not has_both:
        raise MaxlmError(
            f"dense_layers={num_dense} stand before layers with experts",
            fix="give both mlp and moe, or set it to 0",
        )
    if num_dense >= config.num_layers:
        raise MaxlmError(
            f"dense_layers={num_dense} of num_layers={config.num_layers}",
            fix="leave some layers for the experts, or set moe to null",
        )
    if config.pattern and config.attention and config.attention.window is not None:
        raise MaxlmError(
            f"attention.window={config.attention.window} with a pattern",
            where="pattern",
            fix="give windows to its kinds of layers alone",
        )


def check_frontend(config: TransformerSettings) -> None:
    """Raises MaxlmError: a frontend where a model cannot have one."""
    frontend = config.frontend
    if frontend is None:
        return
    if config.transformer_type != "decoder":
        raise MaxlmError(
            f"a frontend before an architecture={config.architecture}",
            where="frontend",
            fix="set it to null, or use a decoder",
        )
    if config.mtp is not None:
        # Its modules read the tokens that follow, and would read placeholders.
        message = "a frontend beside mtp, which reads tokens alone"
        raise MaxlmError(message, where="mtp", fix="set one of them to null")
    if frontend.placeholder_id >= config.vocab_size:
        message = f"{frontend.placeholder_id} is no row of the model's table, "
        message += f"vocab_size={config.vocab_size}"
        fix = "name one that no text has, or raise vocab_size"
        raise MaxlmError(message, where="frontend.placeholder_id", fix=fix)


def check_kinds(config: TransformerSettings) -> None:
    """Raises MaxlmError: a kind that nothing names, or unlike kinds without names."""
    named = set(config.pattern)
    if config.mtp is not None and config.mtp.layer is not None:
        named.add(config.mtp.layer)
    unused = config.kinds.keys() - named
    if unused:
        raise MaxlmError(
            f"kinds.{min(unused)} is not in the pattern",
            where="pattern",
            fix="name it there, or leave it out",
        )
    blocks_without_name = {
        layer.block
        for layer in config.list_period(is_dense=False)
        if not layer.kind_name
    }
    is_named = any(isinstance(entry, str) for entry in config.pattern)
    if len(blocks_without_name) + is_named > 1:
        raise MaxlmError(
            "kinds of layers of different modules without names",
            where="pattern",
            fix="give them names in model.kinds, and list these",
        )


def check_modules(config: TransformerSettings) -> None:
    """Raises MaxlmError: layers of the modules of ``mtp`` read keys of others."""
    for run in config.mtp_runs:
        (kind,) = run.kinds
        if kind.keys_of is not None:
            message = f"modules that read the keys of {kind.keys_of}"
            fix = "name a kind that makes its own in mtp.layer"
            raise MaxlmError(message, where="mtp", fix=fix)


def check_shared_keys(config: TransformerSettings) -> None:
    """Raises MaxlmError: a layer reads keys that no earlier layer makes for it."""
    made_by: dict[str, LayerKind] = {}
    for run in config.layer_runs:
        for name, kind in zip(run.kind_names, run.kinds, strict=True):
            where = f"kinds.{name}.keys_of" if name else "pattern"
            if kind.keys_of is None:
                attention = config.get_attention(kind)
                if attention is not None and attention.shares_keys:
                    message = "shares_keys of a layer that does not say whose"
                    fix = "name their kind in its keys_of"
                    raise MaxlmError(message, where=where, fix=fix)
                made_by[name] = kind
                continue
            if kind.keys_of not in config.kinds:
                message = f"{kind.keys_of} is not among kinds"
                fix = suggest_kind(kind.keys_of, config.kinds)
                raise MaxlmError(message, where=where, fix=fix)
            source = made_by.get(kind.keys_of)
            if source is None:
                message = f"no layer of kind {kind.keys_of} stands before"
                fix = "name a kind of layers that stand before it and make keys"
                raise MaxlmError(message, where=where, fix=fix)
            _check_source_of_keys(config, kind, source, where)


def _check_source_of_keys(
    config: TransformerSettings, kind: LayerKind, source: LayerKind, where: str
) -> None:
    """Raises MaxlmError: a kind reads keys that are not made as its own would be."""
    reader = config.get_attention(kind)
    maker = config.get_attention(source)
    name = kind.keys_of
    if reader is None or maker is None or maker.latent is not None:
        message = f"{name} makes no keys of heads"
        raise MaxlmError(message, where=where, fix="name a kind with attention")
    sizes = (reader.num_kv_heads, reader.head_dim, reader.chunk)
    if sizes != (maker.num_kv_heads, maker.head_dim, maker.chunk):
        message = f"{name} has other kv heads than this kind reads"
        fix = "give both the same num_kv_heads, head_dim and chunk"
        raise MaxlmError(message, where=where, fix=fix)
    if kind.window != source.window:
        message = f"{name} has another window than this kind"
        raise MaxlmError(message, where=where, fix="give both the same window")
    if config.get_positions(kind) != config.get_positions(source):
        message = f"{name} has other positions than this kind"
        raise MaxlmError(message, where=where, fix="give both the same positions")


def check_streams(config: TransformerSettings) -> None:
    """Raises MaxlmError: ``layer_inputs`` or ``block`` in an encoder or beside ``mtp``."""
    needs = {"layer_inputs": config.layer_inputs, "block": config.block}
    for name, setting in needs.items():
        if setting is None:
            continue
        if config.transformer_type != "decoder":
            message = f"{name} of an architecture={config.architecture}"
            raise MaxlmError(
                message, where=name, fix="set it to null, or use a decoder"
            )
        if config.mtp is not None:
            message = f"{name} beside mtp, whose modules have none"
            raise MaxlmError(message, where="mtp", fix="set one of them to null")


def check_norms_of_mixers(config: TransformerSettings) -> None:
    """Raises MaxlmError: a mixer with a norm of its own where the layer has no place for
    one."""
    for block in config.list_blocks():
        if block.mixer is None or not normalizes_itself(block.mixer):
            continue
        if block.placement not in ("pre", "sandwich"):
            message = f"a mixer with a norm of its own, and placement={block.placement}"
            raise MaxlmError(message, where="placement", fix="use pre or sandwich")


def check_shared_blocks(config: TransformerSettings) -> None:
    """Raises MaxlmError: layers that share weights disagree about these, or are of a
    model that cannot have them."""
    first_of_name: dict[str, BlockConfig] = {}
    for block in config.list_blocks_with_shared():
        assert isinstance(block.mixer, ReadsSharedBlock)
        name = block.mixer.block
        first = first_of_name.setdefault(name, block)
        assert isinstance(first.mixer, ReadsSharedBlock)
        settings = (block.mixer.shared_settings, block.norm)
        if settings != (first.mixer.shared_settings, first.norm):
            message = f"layers of mixer.block={name} with unlike attention, mlp or norm"
            fix = "give them the same, or other names of blocks"
            raise MaxlmError(message, where="kinds", fix=fix)
    if not first_of_name:
        return
    if config.transformer_type != "decoder":
        message = f"a shared_block in an architecture={config.architecture}"
        raise MaxlmError(message, where="mixer", fix="use a decoder")
    if config.mtp is not None:
        message = "mtp beside a shared_block, which its modules cannot read"
        raise MaxlmError(message, where="mtp", fix="set it to null")
    if config.block is not None:
        message = "block beside a shared_block, which reads one residual stream"
        raise MaxlmError(message, where="block", fix="set it to null")


def check_positions(config: TransformerSettings) -> None:
    """Raises MaxlmError: positions that attention or the pattern cannot have."""
    all_kinds = config.list_all_kinds()
    for kind in all_kinds:
        _check_positions_of_kind(
            config, config.get_positions(kind), config.get_attention(kind)
        )
    scheme = config.positions.kind
    pattern_positions = [
        kind.positions
        for kind in all_kinds
        if kind.positions is not None and kind.positions.kind != "none"
    ]
    others = [
        positions.kind for positions in pattern_positions if positions.kind != scheme
    ]
    # Layers without positions may stand beside others, whichever the model says.
    if scheme == "none" and len(set(others)) < 2:
        others = []
        scheme = pattern_positions[0].kind if pattern_positions else scheme
    if others:
        raise MaxlmError(
            f"a pattern of other positions than {scheme}",
            where="pattern",
            fix="let all layers have one kind, or none",
        )
    if pattern_positions and scheme not in ("rope", "alibi"):
        raise MaxlmError(
            f"a pattern of positions of kind={scheme}, of which a model has one",
            where="pattern",
            fix="leave them out",
        )


def _check_positions_of_kind(
    config: TransformerSettings,
    positions: PositionsConfig,
    attention: AttentionConfig | None,
) -> None:
    """Raises MaxlmError: a kind's attention cannot have its positions."""
    if attention is None:
        # A kind without attention beside others has no use for them.
        if config.pattern:
            return
        if positions.kind not in ("learned", "sinusoidal", "none"):
            raise MaxlmError(
                f"positions.kind={positions.kind} without attention",
                fix="use learned, sinusoidal or none",
            )
        return
    latent = attention.latent
    head_dim = attention.head_dim
    if latent is not None and positions.kind not in ("rope", "none"):
        raise MaxlmError(
            "latent attention turns queries", fix="use positions.kind=rope or none"
        )
    if latent is not None and positions.rotary_dim is not None:
        raise MaxlmError(
            f"positions.rotary_dim={positions.rotary_dim} with latent attention",
            fix="set attention.latent.rotary_dim alone",
        )
    if positions.kind != "rope":
        return
    if latent is not None:
        rotary_dim = latent.rotary_dim
    else:
        rotary_dim = positions.rotary_dim or head_dim
    if rotary_dim % 2:
        raise ValueError(f"rope needs an even head_dim, not {rotary_dim}")
    if rotary_dim > head_dim:
        raise MaxlmError(
            f"positions.rotary_dim={rotary_dim} of attention.head_dim={head_dim}",
            fix="turn at most all dimensions",
        )
    # Their base has the exponent R / (R − 2).
    scaling = positions.scaling
    if rotary_dim == 2 and isinstance(scaling, NtkScaling | DynamicNtkScaling):
        raise MaxlmError(
            f"scaling.kind={scaling.kind} of one pair of dimensions",
            fix="turn more of them, or use another scaling",
        )
