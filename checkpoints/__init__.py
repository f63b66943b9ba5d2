"""Bytes on disk: finding a checkpoint, and reading its configuration, weights, tokenizer, template and calibrations.

Only what imports in no time is here; take the rest from its module, e.g. `from checkpoints.weights import load_state`.
"""

from checkpoints.config import ModelConfig, RopeConfig, config_hash, load_config
from checkpoints.errors import CheckpointError
from checkpoints.importance import HeadImportance, read_all_importance, read_importance, write_importance
from checkpoints.sharing import LayerSharing, read_sharing, write_sharing

__all__ = [
    "CheckpointError",
    "HeadImportance",
    "LayerSharing",
    "ModelConfig",
    "RopeConfig",
    "config_hash",
    "load_config",
    "read_all_importance",
    "read_importance",
    "read_sharing",
    "write_importance",
    "write_sharing",
]
