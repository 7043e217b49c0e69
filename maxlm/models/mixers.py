"""The mixers beside attention, as they are registered; imported where a config names
one."""

from maxlm.models.blocks import RegisteredMixer
from maxlm.models.layers.gated_delta_net import GatedDeltaNet, GatedDeltaNetConfig
from maxlm.models.layers.kimi_delta_attention import (
    KimiDeltaAttention,
    KimiDeltaAttentionConfig,
)
from maxlm.models.layers.lightning import Lightning, LightningConfig
from maxlm.models.layers.mamba import Mamba, MambaConfig
from maxlm.models.layers.mamba2 import Mamba2, Mamba2Config
from maxlm.models.layers.mamba_heads import MambaHeads, MambaHeadsConfig
from maxlm.models.layers.short_conv import ShortConv, ShortConvConfig
from maxlm.models.layers.sparse import SparseAttention, SparseAttentionConfig
from maxlm.sharding.supported import ReshapingAxis

# Recurrences and convolutions pass their states on where a sequence is split.
_SPLIT_SEQUENCES: tuple[ReshapingAxis, ...] = ("context", "stage")

SPARSE_ATTENTION = RegisteredMixer(
    SparseAttentionConfig, SparseAttention, mesh_axes=("stage",)
)
MAMBA = RegisteredMixer(MambaConfig, Mamba, _SPLIT_SEQUENCES)
MAMBA_HEADS = RegisteredMixer(MambaHeadsConfig, MambaHeads, _SPLIT_SEQUENCES)
MAMBA2 = RegisteredMixer(Mamba2Config, Mamba2, _SPLIT_SEQUENCES)
GATED_DELTA_NET = RegisteredMixer(GatedDeltaNetConfig, GatedDeltaNet, _SPLIT_SEQUENCES)
KIMI_DELTA_ATTENTION = RegisteredMixer(
    KimiDeltaAttentionConfig, KimiDeltaAttention, _SPLIT_SEQUENCES
)
LIGHTNING = RegisteredMixer(LightningConfig, Lightning, _SPLIT_SEQUENCES)
SHORT_CONV = RegisteredMixer(ShortConvConfig, ShortConv, _SPLIT_SEQUENCES)
